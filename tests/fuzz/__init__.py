"""Fuzzing of every reader of outside bytes: mutators, the list of readers, a campaign, and its short form as tests."""
