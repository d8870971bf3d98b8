"""How does what was found look, in a terminal and on a page?

A record says what there is to see in blocks. Text, pages and the command line each draw the same
blocks. Names come from checkpoints, which are data: none can do anything where it is shown.
"""
