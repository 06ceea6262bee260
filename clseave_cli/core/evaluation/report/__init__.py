"""A results document as something to read: Markdown, one self-contained HTML page, figures, LaTeX.

`report.write_report` writes them all; `curves` and `gallery` are what it takes besides the results.
"""
