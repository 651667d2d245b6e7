"""What every study is made of; a study itself declares its units, what one computes, its claims and tables.

units      a unit of work, computed once: one small JSON under the hash of its configuration
results    look-ups in finished units
seeds      a number over seeds, with its interval
verdicts   from an interval to a verdict; claims
ladder     sizes of the models N = 196,608 L^3, and what a unit of them costs
training   the loop that trains a rung
report     study.json, and study.md from it
plots      lines with intervals; files
command    the command line: options, processes, files
"""
