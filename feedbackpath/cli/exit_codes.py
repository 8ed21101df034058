"""What commands return to the shell; one that was interrupted returns 128 and the signal's number."""

DONE = 0
BAD_INPUT = 2
DIVERGED = 3
TRANSPORTS_WEIGHTS = 4
NOT_SETTLED = 5
