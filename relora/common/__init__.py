"""What every package may use: errors for people, stop signals of a process, files that are whole or not there.

Imports Python's own library alone.
"""
