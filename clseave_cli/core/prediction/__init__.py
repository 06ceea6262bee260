"""Answering: one pair or many, with torch or an exported folder; exporting; serving."""
