"""Every figure of an evaluation, from numpy arrays: no models, no files.

`classification` scores one set of logits, `bootstrap` says how sure that is, `baselines` what is
reached without looking, and `transfer` how close a student's embeddings are to its teacher's.
"""
