"""The Ray part: the expert actors, the coordinator that schedules their work, and the progress display."""
