/* Callbacks that unregister: their own subscription, or with -DCROSS the first the second's, and the second the
 * first's. */
#define SUBSCRIPTIONS 2
#define SUBSCRIBED
#define THREADS 3

#ifdef CROSS
#define VICTIM(s) (1 - s)
#else
#define VICTIM(s) s
#endif

bool asked[SUBSCRIPTIONS]; /* a handle is good for one unregister */

inline in_callback(t, s)
{
	bool mine_to_do;
	d_step {
		mine_to_do = !asked[VICTIM(s)];
		asked[VICTIM(s)] = true;
	}
	if
	:: mine_to_do -> mine_to_do = false; unregister(t, VICTIM(s))
	:: else
	fi;
}

#include "protocol.pml"

active [2] proctype changing_memory()
{
	walk();
}

active proctype releasing()
{
	byte s, visited;
	release_space(_pid, s, visited);
}
