"""Ways of searching side by side: what each found, what it spent, and how sure that is."""
