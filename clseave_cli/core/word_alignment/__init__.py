"""Word alignment: which word of a sentence translates which word of another (thesis 3.2.1)."""
