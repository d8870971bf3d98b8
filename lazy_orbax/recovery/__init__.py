"""What is left to do after a failure, or before the end?

`attempt` has the fate of each step that is saved, `cleaning` ends and removes what failed;
`failed_saves` logs failures, `preemption` saves once more before the process is ended.
"""
