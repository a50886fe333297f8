"""Large models for personalised e-commerce advertising: a course that runs.

Modules are imported one by one (``from adlib import market``), so that each can be read alone and ``import adlib`` stays fast.
"""

__version__ = "0.1.0"
