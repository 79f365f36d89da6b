"""A small MPI program that ends well: one sum over all ranks, then wait until told to go."""

import os

from meet import tell, wait_for_go
from mpi4py import MPI

size = int(os.environ["OMPI_COMM_WORLD_SIZE"])  # whatever started this without mpirun does not set it
assert MPI.COMM_WORLD.allreduce(1) == size > 1
tell("ready", str(os.getpid()))
wait_for_go()
