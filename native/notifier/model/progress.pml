/* Memory is changed without end: subscribe and unregister return all the same. */
#define SUBSCRIPTIONS 1
#define THREADS 3
#define ENDLESS

bool finished;

inline in_callback(t, s)
{
	skip;
}

#include "protocol.pml"

active [2] proctype changing_memory()
{
	walk();
}

active proctype coming_and_going()
{
	byte old;
	subscribe(_pid, 0, old);
	unregister(_pid, 0);
	finished = true;
}

ltl it_returns { <>finished }
