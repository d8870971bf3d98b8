"""What do the processes of a job agree on?

`agreement.agreement_on` says with whom a save has to agree; a failure of one is one of all.
"""
