"""Text normalisation of captions for filters.

``ftfy.fix_text`` (Speer, 2019, doi:10.5281/zenodo.2591652) repairs mojibake, HTML entities, odd quotes and widths,
removes control characters and normalises to NFC; then white space becomes single spaces. open_clip's tokeniser cleans
captions the same way. Stored captions do not change.
"""

import ftfy


def clean_text(text: str) -> str:
    """``text`` repaired by ftfy, on one line, with single spaces."""
    return " ".join(ftfy.fix_text(text).split())
