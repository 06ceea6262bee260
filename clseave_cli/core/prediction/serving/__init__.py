"""The HTTP service: requests of many clients gathered into batches, and a page to try it on."""
