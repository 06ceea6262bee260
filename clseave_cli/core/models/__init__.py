"""The networks: entailment head, CLIP-VE, the multilingual student, and their backbones."""

import transformers

# Loading and saving are told of by `core.progress`, not by transformers' own bars and warnings.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
