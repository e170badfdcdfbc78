"""What runs during a term, and what makes sure that it ends with it.

* :mod:`.base`    what the keeper asks of it
* :mod:`.fence`   the kernel's timer: SIGKILL at the end of trust, whoever is asleep
* :mod:`.tree`    the processes below one, killed to the last
* :mod:`.proof`   who owns the work, and proof that it is dead
* :mod:`.reaper`  the small process that owns a child's tree and outlives its supervisor
* :mod:`.child`   work as a supervised child process
* :mod:`.body`    work as a coroutine of this process
"""
