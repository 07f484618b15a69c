/* The protocol of the notifiers' core as a model for spin (tests/integration/test_notifier_model.py): walk,
 * unregister, release, subscribe. The scenarios beside it include this file and say who does what.
 *
 * What the model keeps of the C: the list is replaced as a whole and read under RCU; each subscription counts
 * its calls in flight; a change is counted in one of two phases from its start to its end. What it leaves
 * out: intervals, queues, and weak memory (spin's memory is sequentially consistent; the thread sanitizer
 * looks after the orders).
 *
 * Known to be wrong, each by a -D, and each has to fail:
 *   NO_GRACE_PERIOD   unregister does not wait for RCU
 *   NO_COUNT          unregister does not wait for the calls in flight
 *   COUNT_AFTER_RCU   a walk leaves RCU before it counts its call
 *   RELEASE_UNTAKEN   release and unregister look whether release was called, and call it, in two steps
 *   ALL_FRAMES        unregister waits for its own callback, too
 *   NO_CYCLE_CHECK    two callbacks that unregister each other wait for each other
 *   NO_DRAIN          subscribe does not wait for the changes that loaded the old list
 *   CURRENT_ONLY      it waits for the current phase, and not first for the idle one
 *   NO_PHASES         it waits until no change at all is under way
 *   DRAIN_LOCKED      it holds the lock of the list meanwhile
 */
#define NOBODY 255
#define BIT(i) (1 << (i))

/* Subscriptions. */
#ifdef SUBSCRIBED
bool allocated[SUBSCRIPTIONS] = true; /* its memory */
byte list = BIT(SUBSCRIPTIONS) - 1;     /* as published: a bit for each subscription */
#else
bool allocated[SUBSCRIPTIONS];
byte list;
#endif
bool returned[SUBSCRIPTIONS];  /* unregister has returned, having waited for every call */
bool forsaken[SUBSCRIPTIONS];  /* nobody waits for its last call, which frees it */
bool taken[SUBSCRIPTIONS];     /* somebody calls, or has called, release */
byte releases[SUBSCRIPTIONS];  /* calls of release */
byte calls[SUBSCRIPTIONS];     /* in flight */
byte birth[SUBSCRIPTIONS];
byte births;                   /* so far; of the list as published, too */
bool list_lock;                /* of those who change the list; callbacks take it */
bool drain_lock;               /* of those who wait for changes; callbacks do not */

/* Threads. */
byte told[THREADS];     /* whom its change told the start and not yet the end: a bit for each */
bool changing[THREADS]; /* between start and end */
byte inside[THREADS] = NOBODY; /* the subscription of which it runs a callback */
byte waits[THREADS] = NOBODY;  /* the subscription whose calls it waits for */

/* RCU: a grace period waits for the sections that were there when it began. */
byte sections;      /* threads in RCU: a bit for each */
byte owed[THREADS]; /* of the grace period that this thread waits for */

/* Changes under way, by phase. */
byte changes[2];
bit phase;

byte i; /* of loops that are one step; 0 in between */

inline rcu_leave(t)
{
	sections = sections & ~BIT(t);
	for (i : 0 .. THREADS - 1) {
		owed[i] = owed[i] & ~BIT(t);
	}
	i = 0;
}

inline grace_period(t)
{
#ifdef NO_GRACE_PERIOD
	skip;
#else
	owed[t] = sections;
	owed[t] == 0;
#endif
}

inline acquire(lock)
{
	d_step { !lock -> lock = true; }
}

/* -- calls ---------------------------------------------------------------------------------- */

/* Enters RCU, loads the list, finds the first that was not visited and is as old as `version`: the walk holds
 * `s`, or NOBODY. */
inline look(t, version, visited, s)
{
	d_step {
		s = 0;
		do
		:: s < SUBSCRIPTIONS && (!(list & ~visited & BIT(s)) || birth[s] > version) -> s++
		:: else -> break
		od;
		if
		:: s == SUBSCRIPTIONS -> s = NOBODY
		:: else -> sections = sections | BIT(t)
		fi;
	}
}

/* Reads the subscription, counts the call, leaves RCU. */
inline take(t, s)
{
#ifdef COUNT_AFTER_RCU
	d_step {
		assert(allocated[s]);
		rcu_leave(t);
	}
	d_step {
		assert(allocated[s]);
		calls[s]++;
	}
#else
	d_step {
		assert(allocated[s]);
		calls[s]++;
		rcu_leave(t);
	}
#endif
}

inline put(s)
{
	assert(allocated[s] && calls[s] > 0);
	calls[s]--;
	if
	:: calls[s] == 0 && forsaken[s] -> allocated[s] = false
	:: else
	fi;
}

/* A callback has two moments, so that everybody else may do something in between. */
inline callback_begin(t, s)
{
	assert(allocated[s] && !returned[s]);
	inside[t] = s;
}

inline callback_end(t, s)
{
	d_step {
		/* Only who unregistered from within may be in it still. */
		assert(allocated[s] && (!returned[s] || forsaken[s]));
		inside[t] = NOBODY;
		put(s);
	}
}

/* release, exactly once. */
inline call_release(s)
{
#ifdef RELEASE_UNTAKEN
	bool was;
	was = taken[s];
	taken[s] = true;
	if
	:: was
#else
	bool first;
	d_step {
		first = !taken[s];
		taken[s] = true;
	}
	if
	:: !first
#endif
	:: else ->
		d_step {
			assert(allocated[s] && !returned[s]);
			releases[s]++;
			assert(releases[s] == 1);
		}
		/* ... and it is at work until here. */
		assert(allocated[s] && !returned[s]);
	fi;
}

/* -- a change: start, the memory changes, end ------------------------------------------------ */

inline change_start(t, s, mine, visited, version)
{
	mine = phase;
	changes[mine]++;
	version = births;
	do
	:: look(t, version, visited, s);
		if
		:: s == NOBODY -> break
		:: else -> take(t, s)
		fi;
		if
		:: d_step {
			taken[s] -> visited = visited | BIT(s);
			put(s);
		}
		:: d_step {
			!taken[s] -> visited = visited | BIT(s);
			callback_begin(t, s);
			assert(!(told[t] & BIT(s)));
			told[t] = told[t] | BIT(s);
		}
			in_callback(t, s);
			callback_end(t, s)
		fi
	od;
	atomic {
		changing[t] = true;
		visited = 0;
	}
}

/* To those who were told the start, without any list of them: who is as old as the list was then. */
inline change_end(t, s, mine, visited, version)
{
	changing[t] = false;
	do
	:: look(t, version, visited, s);
		if
		:: s == NOBODY -> break
		:: else -> take(t, s)
		fi;
		if
		:: d_step {
			taken[s] -> visited = visited | BIT(s);
			put(s);
		}
		:: d_step {
			!taken[s] -> visited = visited | BIT(s);
			callback_begin(t, s);
			assert(told[t] & BIT(s));
			told[t] = told[t] & ~BIT(s);
		}
			in_callback(t, s);
			callback_end(t, s)
		fi
	od;
	atomic {
		/* Balanced: whoever was told the start was told the end, or is released or in the list no more. */
		for (i : 0 .. SUBSCRIPTIONS - 1) {
			assert(!(told[t] & list & BIT(i)) || taken[i]);
		}
		i = 0;
		told[t] = 0;
		visited = 0;
		version = 0;
		s = 0;
		changes[mine]--;
		mine = 0;
	}
}

/* -- those who change the list --------------------------------------------------------------- */

/* Two callbacks wait for each other when this one runs in a callback of what another thread waits for, while
 * that thread runs a callback of what this one would wait for. */
inline look_for_cycle(t, s, cycle)
{
	d_step {
		cycle = false;
#ifndef NO_CYCLE_CHECK
		for (i : 0 .. THREADS - 1) {
			if
			:: i != t && inside[t] != NOBODY && inside[i] == s && waits[i] == inside[t] -> cycle = true
			:: else
			fi;
		}
		i = 0;
#endif
		if
		:: !cycle -> waits[t] = s
		:: else
		fi;
	}
}

#ifdef ALL_FRAMES
#define OWN(t, s) 0
#else
#define OWN(t, s) (inside[t] == s -> 1 : 0)
#endif

inline unregister(t, s)
{
	bool cycle;
	call_release(s);
	d_step { !list_lock -> list = list & ~BIT(s); }
	grace_period(t);
	look_for_cycle(t, s, cycle);
	if
	:: cycle -> skip
	:: else ->
#ifndef NO_COUNT
		calls[s] == OWN(t, s);
#endif
		d_step {
			waits[t] = NOBODY;
			/* Of a callback of its own it is known that it runs still. */
			returned[s] = true;
		}
	fi;
	d_step {
		cycle = false;
		if
		:: calls[s] > 0 -> forsaken[s] = true
		:: else -> allocated[s] = false
		fi;
	}
#ifdef NO_COUNT
	allocated[s] = false;
#endif
}

/* The space goes away. */
inline release_space(t, s, visited)
{
	do
	:: look(t, births, visited, s);
		if
		:: s == NOBODY -> break
		:: else -> take(t, s)
		fi;
		visited = visited | BIT(s);
		call_release(s);
		d_step { put(s); }
	od;
}

inline drain(old)
{
#ifdef NO_PHASES
	changes[0] + changes[1] == 0;
#else
#ifndef CURRENT_ONLY
	changes[1 - phase] == 0;
#endif
	d_step {
		old = phase;
		phase = 1 - old;
	}
	changes[old] == 0;
	old = 0;
#endif
}

/* When it returns, the changes that loaded the list without it have ended. */
inline subscribe(t, s, old)
{
	acquire(list_lock);
	d_step {
		allocated[s] = true;
		births++;
		birth[s] = births;
		list = list | BIT(s);
	}
#ifndef DRAIN_LOCKED
	list_lock = false;
#endif
	acquire(drain_lock);
#ifdef NO_DRAIN
	skip;
#else
	drain(old);
#endif
	drain_lock = false;
#ifdef DRAIN_LOCKED
	list_lock = false;
#endif
	d_step {
		for (i : 0 .. THREADS - 1) {
			assert(!changing[i] || (told[i] & BIT(s)) || !(list & BIT(s)));
		}
		i = 0;
	}
}

/* -- a thread that changes memory ------------------------------------------------------------ */

#ifndef CHANGES
#define CHANGES 1
#endif

inline walk()
{
	byte s, visited, mine, version;
	byte left = CHANGES;
	do
	:: left > 0 ->
		change_start(_pid, s, mine, visited, version);
		change_end(_pid, s, mine, visited, version);
#ifndef ENDLESS
		left--;
#endif
	:: else -> break
	od;
}
