"""How `tpbook.bench` times and counts: the clock (`clock`), the slicing bound (`bound`), what takes turns (`rows`), and
what a stage starts and moves (`operators`).
"""
