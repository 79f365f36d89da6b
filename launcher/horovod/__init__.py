"""Horovod's API on the launcher's collectives: ``import launcher.horovod.torch as hvd``.

Scripts that say ``import horovod.torch as hvd`` get it without a change under ``--horovod-compat``
(:mod:`launcher.rank.compat`). Names are negotiated as in Horovod, so ranks may submit in different orders; there is no
cycle to wait for, and gradients are reduced in shared memory.

This package itself imports no framework.
"""

# The release whose API this follows, for scripts that compare versions.
__version__ = "0.28.1"
