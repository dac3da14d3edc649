"""Results as tables, documents and pictures.

Everything here reads ``hesscli.results`` and nothing below it: whatever is drawn or printed
can be made again from a result alone, without the model.
"""
