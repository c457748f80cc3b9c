"""Methods, one per file: what a method learns, from which fields of a sample, with which loss.

``pipeline.models.<name>`` holds a frozen ``Config`` and one subclass of ``Method``; see method.py for the contract.
"""
