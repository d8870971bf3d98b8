"""Where do snapshots live that outlive the process that took them, and who looks after them?"""
