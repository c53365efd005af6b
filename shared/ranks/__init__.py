"""The ranks of one launch: process groups, messages, the loop that all of them run, heartbeats."""
