"""What a run did, for people: one HTML file from run folders, made from what the runs recorded and nothing else."""
