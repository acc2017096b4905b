// SPDX-License-Identifier: GPL-2.0
/*
 * The end of a daemon's term. Who comes to us looks at it by himself (df_in_term()); but what is
 * in page tables is read without coming here, so at the end of the term it is taken out of them.
 * A fault that brings it back waits for the daemon.
 *
 * The daemon makes the term longer without a word. So the timer is set for what the end was when
 * it was last looked at, and has it looked at again then; only where something is mapped.
 */
#include "internal.h"

/* What is unmapped is unmapped again so much later: a fault may have been about to map a page. */
#define DF_UNMAP_AGAIN	(100 * NSEC_PER_MSEC)
#define DF_UNMAP_TIMES	2
/* Longest time until the end is looked at again: it may have become an earlier one. */
#define DF_LOOK		NSEC_PER_SEC

struct workqueue_struct *df_term_wq;

static enum hrtimer_restart df_term_ends(struct hrtimer *timer)
{
	struct df_att *att = container_of(timer, struct df_att, term_timer);

	queue_work(df_term_wq, &att->term_work);
	return HRTIMER_NORESTART;
}

/* With mapped_lock held. */
static void df_term_start(struct df_att *att)
{
	u64 now = ktime_get_boottime_ns();
	u64 end = READ_ONCE(att->shared->term_end);
	u64 next = end <= now ? now + DF_UNMAP_AGAIN : min(end, now + DF_LOOK);

	if (!READ_ONCE(att->dead))
		hrtimer_start(&att->term_timer, ns_to_ktime(next), HRTIMER_MODE_ABS);
}

/*
 * No page is waited for, and no lock that is held while the daemon is asked: it may be stopped.
 * So no reference to an inode is taken, either, for letting go of it may write it back. Who
 * evicts one comes to df_map_forget() first.
 */
static void df_term_work(struct work_struct *work)
{
	struct df_att *att = container_of(work, struct df_att, term_work);
	struct df_sb *ds = READ_ONCE(att->sb);
	struct df_inode *di, *next;

	mutex_lock(&ds->mapped_lock);
	if (READ_ONCE(att->shared->term_end) <= ktime_get_boottime_ns()) {
		list_for_each_entry_safe(di, next, &ds->mapped, mapped_link) {
			unmap_mapping_range(di->inode->i_mapping, 0, 0, 0);
			df_count(att, DISTFUSE_TERM_UNMAPS);
			if (di->mapped == 1)
				list_del_init(&di->mapped_link);
			/* Pairs with the acquire in df_map_forget(): nothing is done with it. */
			smp_store_release(&di->mapped, di->mapped - 1);
		}
	}
	if (!list_empty(&ds->mapped))
		df_term_start(att);
	mutex_unlock(&ds->mapped_lock);
}

/* Pages of an inode are about to be mapped. */
void df_map_note(struct df_inode *di)
{
	struct df_sb *ds = di->sb;
	struct df_att *att;

	if (likely(READ_ONCE(di->mapped) == DF_UNMAP_TIMES))
		return;
	mutex_lock(&ds->mapped_lock);
	if (list_empty(&di->mapped_link)) {
		att = READ_ONCE(ds->att);
		if (att && list_empty(&ds->mapped))
			df_term_start(att);
		list_add_tail(&di->mapped_link, &ds->mapped);
	}
	WRITE_ONCE(di->mapped, DF_UNMAP_TIMES);
	mutex_unlock(&ds->mapped_lock);
}

/* An inode is being evicted: nothing of it is mapped any more, and none will be. */
void df_map_forget(struct df_inode *di)
{
	/* Pairs with the release in df_term_work(). */
	if (!smp_load_acquire(&di->mapped))
		return;
	mutex_lock(&di->sb->mapped_lock);
	list_del_init(&di->mapped_link);
	di->mapped = 0;
	mutex_unlock(&di->sb->mapped_lock);
}

/* Another daemon has attached: what was mapped before may be once more, and is noted already. */
void df_term_begin(struct df_att *att)
{
	mutex_lock(&att->sb->mapped_lock);
	if (!list_empty(&att->sb->mapped))
		df_term_start(att);
	mutex_unlock(&att->sb->mapped_lock);
}

void df_term_init(struct df_att *att)
{
	df_timer_setup(&att->term_timer, df_term_ends, CLOCK_BOOTTIME);
	INIT_WORK(&att->term_work, df_term_work);
}

/* The daemon is gone, or the mount with all its inodes: neither starts the timer any more. */
void df_term_stop(struct df_att *att)
{
	/* Who is about to start it does so now, or finds the daemon dead. */
	mutex_lock(&att->sb->mapped_lock);
	mutex_unlock(&att->sb->mapped_lock);
	hrtimer_cancel(&att->term_timer);
	cancel_work_sync(&att->term_work);
	hrtimer_cancel(&att->term_timer);
}
