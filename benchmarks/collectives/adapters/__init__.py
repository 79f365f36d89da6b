"""How each contender does the one thing that is compared: the sum of a buffer over all ranks, in place.

A module a contender, with a class ``Adapter(support, store, options)``:

- ``version``: of the library, as it says itself;
- ``checked``: whether its result is the sum (False for the memory's limit);
- ``buffer(nbytes)``, ``release(buffer)``: memory as an application would have it;
- ``allreduce(buffer, dtype)``: the call to time, as a function without arguments that returns when the sum is there;
- ``close()``.
"""
