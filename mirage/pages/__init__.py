"""The look that all HTML pages share, and the document around them: files that open from disk and load nothing."""
