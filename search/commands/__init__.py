"""What each command of the command line does; ``search/cli.py`` says what it takes."""
