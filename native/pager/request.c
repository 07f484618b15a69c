/* What asynchronous stores were asked for and have not answered yet. Under the uf's lock. */
#include "pager/internal.h"

#include <errno.h>

#include "common/clock.h"

static const uint64_t ns_per_ms = 1000000;

static struct request *find_request(struct umm_uf *uf, struct umm_region *region, uint64_t unit)
{
	for (uint32_t i = 0; i < uf->n_requests; i++)
		if (uf->requests[i].region == region && uf->requests[i].unit == unit)
			return &uf->requests[i];
	return NULL;
}

/* A store whose places are all taken is asked again from requests_expire(); until then the request waits
 * with its deadline running: the places may be taken by requests that are never answered. */
static int send(struct umm_region *region, uint64_t unit, struct request *request)
{
	struct umm_store *store = region->store;
	int err = store->ops->request(store, region, unit * region->unit, region->unit);
	if (request)
		request->unsent = err == -EAGAIN && store->timeout_ms;
	if (!err || (request && request->unsent))
		return 0;
	request_done(region, unit);
	return err;
}

int request_unit(struct umm_region *region, uint64_t unit, const struct times *times)
{
	struct umm_uf *uf = region->uf;
	struct umm_store *store = region->store;
	struct request *request = NULL;
	bool needed = store->timeout_ms || store->retries;
	if (needed || times) {
		request = find_request(uf, region, unit);
		if (!request && uf->n_requests < MAX_REQUESTS) {
			request = &uf->requests[uf->n_requests++];
			*request = (struct request){.region = region, .unit = unit};
			if (times)
				request->times = *times;
		}
		if (!request && needed)
			return -EAGAIN;
	}
	if (request)
		request->deadline_ns =
		        store->timeout_ms ? umm_now_ns() + store->timeout_ms * ns_per_ms : UINT64_MAX;
	return send(region, unit, request);
}

bool request_times(struct umm_region *region, uint64_t unit, struct times *ret)
{
	struct request *request = find_request(region->uf, region, unit);
	if (!request || !request->times.arrived)
		return false;
	*ret = request->times;
	return true;
}

void request_done(struct umm_region *region, uint64_t unit)
{
	struct umm_uf *uf = region->uf;
	struct request *request = find_request(uf, region, unit);
	if (request)
		*request = uf->requests[--uf->n_requests];
}

bool request_again(struct umm_region *region, uint64_t unit)
{
	struct request *request = find_request(region->uf, region, unit);
	return request && request->tries++ < region->store->retries && request_unit(region, unit, NULL) == 0;
}

uint64_t requests_expire(struct umm_uf *uf, uint64_t now)
{
	uint64_t next = 0;
	for (uint32_t i = 0; i < uf->n_requests;) {
		struct request *request = &uf->requests[i];
		if (request->deadline_ns > now && request->unsent) {
			struct umm_region *region = request->region;
			uint64_t unit = request->unit;
			int err = send(region, unit, request);
			if (err) {
				if (unit_state(region, unit) == UNIT_FETCHING)
					finish_claim(region, unit, NULL, err, 0, false);
				continue;
			}
		}
		if (request->deadline_ns > now) {
			if (!next || request->deadline_ns < next)
				next = request->deadline_ns;
			i++;
			continue;
		}
		struct umm_region *region = request->region;
		uint64_t unit = request->unit;
		region->counters.store_errors++;
		uf->counters.store_errors++;
		if (request_again(region, unit))
			continue; /* it has a new deadline: looked at again, and passed */
		request_done(region, unit);
		if (unit_state(region, unit) == UNIT_FETCHING)
			finish_claim(region, unit, NULL, -ETIMEDOUT, 0, false);
	}
	return next;
}
