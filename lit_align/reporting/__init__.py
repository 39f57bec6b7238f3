"""Reports, plots and metrics of a run, from the files in its folder."""
