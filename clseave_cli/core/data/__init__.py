"""SNLI-VE-shaped data: reading, validating, joining languages, images, the mini-VE world."""
