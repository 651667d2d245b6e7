"""What a machine's GPUs do with this project: ``make gpu-check``, ten minutes, no network, one page.

A part that fails, hangs or is killed is told with its reason, and the others run all the same. Without a GPU
it does what a CPU can do, so that the check itself is tested.

    parts   what is checked, each in processes of its own
    roads   stages of a tiny recipe as the parts start them
    beside  ours and trl's trainers on the same work
    child   what has to be measured inside a process that owns the GPU
    report  gpu-check.md
"""
