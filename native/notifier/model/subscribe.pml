/* Two subscriptions come while memory is being changed. With -DAND_GO one thread changes memory, and the callback
 * of the first subscription unregisters it. */
#define SUBSCRIPTIONS 2
#ifdef AND_GO
#define WALKERS 1
#define CHANGES 2
#else
#define WALKERS 2
#endif
#define THREADS (WALKERS + 2)

#ifdef AND_GO
bool asked;
#endif

inline in_callback(t, s)
{
#ifdef AND_GO
	if
	:: s == 0 && !asked -> asked = true; unregister(t, s)
	:: else
	fi;
#else
	skip;
#endif
}

#include "protocol.pml"

active [WALKERS] proctype changing_memory()
{
	walk();
}

active [2] proctype subscribing()
{
	byte old;
	subscribe(_pid, _pid - WALKERS, old);
}
