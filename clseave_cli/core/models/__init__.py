"""The networks: entailment head, CLIP-VE, the multilingual student, and their backbones."""
