"""End the daemon at random moments of a load, in every way there is; look for what is lost or left.

A round: mount, let eight programs change and read files in it (tests/harness/load.py), do it, and hold
the source against what the programs were told. Then files are changed in the source, the next daemon
mounts over what the last one left, and all that is read through it must be what the source has. A
failure prints the seed that its round follows from.

Exit status: 0 nothing was lost or left behind, 1 something was (the message says what), 2 wrong call.
"""
