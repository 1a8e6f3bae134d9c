"""Imported first by the process that trials are forked from, and by no other: there the libraries that it loads have nobody to
tell what they miss.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
