"""Collectives between the ranks of a job: allreduce and its kin on shared memory inside a host, an engine's leg across.

``launcher.Communicator`` is the face for arrays; ``launcher.collectives.group.join`` gives what all faces stand on.
"""
