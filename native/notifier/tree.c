/* The subscriptions of a space: a persistent treap of intervals. */
#include <errno.h>
#include <stdlib.h>

#include "notifier/internal.h"
#include "notifier/rcu.h"

enum { GARBAGE_MAX = 5000 };

static bool after_cursor(const struct node *node, const struct cursor *cursor)
{
	return node->start > cursor->start || (node->start == cursor->start && node->birth > cursor->birth);
}

static struct umm_subscription *next_in(
        const struct node *node, uint64_t start, uint64_t end, uint64_t version, const struct cursor *after)
{
	while (node && node->max_end > start) {
		bool past = !after->birth || after_cursor(node, after);
		if (past) {
			struct umm_subscription *found = next_in(node->left, start, end, version, after);
			if (found)
				return found;
			if (node->start >= end)
				return NULL;
			if (node->end > start && node->birth <= version)
				return node->subscription;
		}
		node = node->right;
	}
	return NULL;
}

struct umm_subscription *tree_next(
        const struct tree *tree, uint64_t start, uint64_t end, uint64_t version, const struct cursor *after)
{
	return next_in(tree->root, start, end, version, after);
}

/* What a change of the tree makes and replaces: published or undone as a whole. */
struct change {
	struct node *made, *replaced;
	bool failed;
};

static uint64_t max_end(const struct node *node)
{
	uint64_t end = node->end;
	if (node->left && node->left->max_end > end)
		end = node->left->max_end;
	if (node->right && node->right->max_end > end)
		end = node->right->max_end;
	return end;
}

static void replaced(struct change *change, struct node *node)
{
	node->next_garbage = change->replaced;
	change->replaced = node;
}

static struct node *fresh(
        struct change *change, const struct node *like, struct node *left, struct node *right)
{
	struct node *node = malloc(sizeof(*node));
	if (!node) {
		change->failed = true;
		return NULL;
	}
	*node = *like;
	node->left = left;
	node->right = right;
	node->max_end = max_end(node);
	node->next_garbage = change->made;
	change->made = node;
	return node;
}

static bool before(const struct node *a, const struct node *b)
{
	return a->start < b->start || (a->start == b->start && a->birth < b->birth);
}

/* Splits copies of the path: what is before `key` and what is not. */
static void split(struct change *change, struct node *node, const struct node *key, struct node **low,
        struct node **high)
{
	*low = *high = NULL;
	if (!node || change->failed)
		return;
	replaced(change, node);
	struct node *inner;
	if (before(node, key)) {
		split(change, node->right, key, &inner, high);
		*low = fresh(change, node, node->left, inner);
	} else {
		split(change, node->left, key, low, &inner);
		*high = fresh(change, node, inner, node->right);
	}
}

static struct node *insert(struct change *change, struct node *node, const struct node *key)
{
	if (change->failed)
		return NULL;
	if (!node || node->priority < key->priority) {
		struct node *low, *high;
		split(change, node, key, &low, &high);
		return fresh(change, key, low, high);
	}
	replaced(change, node);
	if (before(key, node))
		return fresh(change, node, insert(change, node->left, key), node->right);
	return fresh(change, node, node->left, insert(change, node->right, key));
}

static struct node *merge(struct change *change, struct node *low, struct node *high)
{
	if (!low || !high || change->failed)
		return low ? low : high;
	if (low->priority >= high->priority) {
		replaced(change, low);
		return fresh(change, low, low->left, merge(change, low->right, high));
	}
	replaced(change, high);
	return fresh(change, high, merge(change, low, high->left), high->right);
}

static struct node *remove_key(struct change *change, struct node *node, const struct node *key)
{
	if (!node || change->failed)
		return NULL;
	replaced(change, node);
	if (node->birth == key->birth)
		return merge(change, node->left, node->right);
	if (before(key, node))
		return fresh(change, node, remove_key(change, node->left, key), node->right);
	return fresh(change, node, node->left, remove_key(change, node->right, key));
}

static uint64_t mix(uint64_t x)
{
	/* splitmix64: priorities that do not follow the order of registration */
	x += 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static struct node key_of(const struct umm_subscription *subscription)
{
	return (struct node){
	        .subscription = (struct umm_subscription *)subscription,
	        .start = subscription->start,
	        .birth = subscription->birth,
	        .end = subscription->end,
	        .max_end = subscription->end,
	        .priority = mix(subscription->birth),
	};
}

static void free_list(struct node *list)
{
	while (list) {
		struct node *next = list->next_garbage;
		free(list);
		list = next;
	}
}

static int publish(struct umm_space *space, struct change *change, struct node *root, uint64_t version)
{
	struct tree *old = atomic_load_explicit(&space->tree, memory_order_relaxed);
	struct tree *tree = NULL;
	if (!change->failed && root) {
		tree = malloc(sizeof(*tree));
		change->failed = !tree;
	}
	if (change->failed) {
		free_list(change->made);
		return -ENOMEM;
	}
	if (tree)
		*tree = (struct tree){.root = root, .version = version};
	atomic_store(&space->tree, tree);
	if (old) {
		old->next_garbage = space->tree_garbage;
		space->tree_garbage = old;
	}
	while (change->replaced) {
		struct node *node = change->replaced;
		change->replaced = node->next_garbage;
		node->next_garbage = space->garbage;
		space->garbage = node;
		space->n_garbage++;
	}
	if (space->n_garbage > GARBAGE_MAX)
		tree_collect(space);
	return 0;
}

int tree_insert(struct umm_space *space, struct umm_subscription *subscription)
{
	struct tree *old = atomic_load_explicit(&space->tree, memory_order_relaxed);
	struct change change = {0};
	struct node key = key_of(subscription);
	struct node *root = insert(&change, old ? old->root : NULL, &key);
	return publish(space, &change, root, subscription->birth);
}

int tree_remove(struct umm_space *space, struct umm_subscription *subscription)
{
	struct tree *old = atomic_load_explicit(&space->tree, memory_order_relaxed);
	struct change change = {0};
	struct node key = key_of(subscription);
	struct node *root = remove_key(&change, old->root, &key);
	return publish(space, &change, root, old->version);
}

void tree_free_garbage(struct node *nodes, struct tree *trees)
{
	free_list(nodes);
	while (trees) {
		struct tree *next = trees->next_garbage;
		free(trees);
		trees = next;
	}
}

void tree_collect(struct umm_space *space)
{
	umm_rcu_synchronize();
	tree_free_garbage(space->garbage, space->tree_garbage);
	space->garbage = NULL;
	space->tree_garbage = NULL;
	space->n_garbage = 0;
}
