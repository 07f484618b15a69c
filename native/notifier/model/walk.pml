/* Two changes, while one of two subscriptions is unregistered and the space is released. */
#define SUBSCRIPTIONS 2
#define SUBSCRIBED
#define THREADS 4

inline in_callback(t, s)
{
	skip;
}

#include "protocol.pml"

active [2] proctype changing_memory()
{
	walk();
}

active proctype unregistering()
{
	unregister(_pid, 0);
	assert(releases[0] == 1);
}

active proctype releasing()
{
	byte s, visited;
	release_space(_pid, s, visited);
	assert(releases[1] == 1);
}
