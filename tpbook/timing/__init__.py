"""How `tpbook.bench` times: the clock (`clock`), the slicing bound (`bound`), and what takes turns (`rows`)."""
