"""The stages of a search, a file each: what it depends on, and how it makes its artefact."""
