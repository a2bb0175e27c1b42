"""Faults on purpose: runs that are ended at random, and inputs that are damaged at random. `make faults` runs them all.

python -m tests.faults.ends --count 300     random ends of small runs, which are then resumed and checked
python -m tests.faults.exact --count 30     resumed runs that must equal uninterrupted ones, bit by bit
python -m tests.faults.fuzz --count 1000    malformed command lines, files and environments
python -m tests.faults.soak --hours 12      a long run whose memory, files and disk must stay flat
"""
