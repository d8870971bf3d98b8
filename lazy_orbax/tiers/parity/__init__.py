"""Which machines keep parity of each other's snapshots, and how is a lost snapshot made again?"""
