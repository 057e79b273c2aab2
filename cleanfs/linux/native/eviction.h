/* What the program in the kernel (evictions.bpf.c) and its loader share. */
#pragma once

#include <linux/types.h>

#define EVICTION_PAGE_SIZE 4096
#define EVICTION_MAX_FOLIO_PAGES 512 /* of a larger folio, which no file has yet, the rest is lost */
#define EVICTION_CANDIDATES 512      /* addresses tried for one page when the direct map is sought */

/* Why a page leaves the page cache. */
enum eviction_cause {
	EVICTION_RECLAIMED = 0,    /* its reference count is frozen at 0: reclaim, drop_caches, fadvise */
	EVICTION_INODE_EVICTED = 1 /* the whole inode leaves the kernel's memory */,
	EVICTION_REMOVED = 2       /* truncation, invalidation */
};

/* One page that has left the page cache: a record of the ring buffer. */
struct eviction {
	__u64 inode;
	__u64 index;
	__u64 file_size;      /* as the kernel knows it */
	__u64 direct_map;     /* see `eviction_settings` */
	__u32 cause;
	__u32 readable;       /* `page` was copied */
	char page[EVICTION_PAGE_SIZE];
};

/* Written by the loader while the program runs. */
struct eviction_settings {
	__u64 device;         /* dev_t, as the kernel keeps it, of the mount */
	/* The page of a folio is at `folio * (page size / sizeof(struct page)) + direct_map`, modulo 2^64. */
	__u64 direct_map;
	__u64 wake_bytes;     /* the consumer is woken if as much is in the ring */
	__u64 trial_inode;    /* pages of this one are reported whatever their cause; 0: none */
	__u64 trial_mark;     /* the first bytes of each of its pages */
	__u64 trial_base;     /* the first address to try is so many GiB away; with `seeks` */
	__u32 seeks;          /* try addresses for pages of `trial_inode` */
	__u32 paused;
};

/* Of pages of the mount. */
struct eviction_counts {
	__u64 seen;           /* left the page cache for whatever cause */
	__u64 removed;        /* by truncation or invalidation */
	__u64 unclean;        /* not up to date, dirty or being written */
	__u64 lost;           /* the ring was full */
	__u64 unreadable;     /* the copy failed */
};
