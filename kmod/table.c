// SPDX-License-Identifier: GPL-2.0
/* The lease of an inode: entering beyond the fast path, waiting, leaving. */
#include "internal.h"

bool df_is_dead(struct df_sb *ds)
{
	struct df_att *att = READ_ONCE(ds->att);

	return !att || READ_ONCE(att->dead);
}

struct distfuse_entry *df_entry_find(struct df_att *att, u64 ino)
{
	struct distfuse_entry *set = att->table + distfuse_set(ino, att->set_bits) * DISTFUSE_WAYS;
	int way;

	for (way = 0; way < DISTFUSE_WAYS; way++)
		if (READ_ONCE(set[way].ino) == ino)
			return set + way;
	return NULL;
}

/* The entry of an inode in the present table, looked up again if it has moved. */
struct distfuse_entry *df_entry_of(struct df_inode *di)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	struct distfuse_entry *entry = READ_ONCE(di->entry);

	if (!att)
		return NULL;
	if (!entry || entry < att->table || entry >= att->table + att->nr_entries ||
	    READ_ONCE(entry->ino) != di->ino) {
		entry = df_entry_find(att, di->ino);
		WRITE_ONCE(di->entry, entry);
	}
	return entry;
}

bool df_would_admit(struct df_inode *di, u32 mode)
{
	struct distfuse_entry *entry = df_entry_of(di);
	u64 word;

	if (!entry)
		return false;
	word = atomic64_read_acquire(df_word(entry));
	return df_admits(word, mode) && READ_ONCE(entry->ino) == di->ino && df_in_term(di->sb);
}

/* Enters if the lease is held, installed or not, within the term. Does not sleep. */
struct distfuse_entry *df_try(struct df_inode *di, u32 mode, u64 set)
{
	struct distfuse_entry *entry = df_entry_of(di);
	s64 word;

	if (!entry || !df_in_term(di->sb))
		return NULL;
	word = atomic64_read_acquire(df_word(entry));
	do {
		if (!df_admits(word, mode) || READ_ONCE(entry->ino) != di->ino)
			return NULL;
	} while (!atomic64_try_cmpxchg_acquire(df_word(entry), &word,
					       (word + 1) | DISTFUSE_USED | set));
	return entry;
}

/*
 * Tells the daemon, once for all tasks, that the lease is wanted. Together with the look that
 * follows in df_wait() nothing is lost: what is granted after the NEED is followed by a WAKE.
 */
static void df_ask(struct df_inode *di, u32 mode)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	struct distfuse_entry *entry = df_entry_of(di);
	struct df_post *post = &di->need_post[mode];
	bool ask;

	if (!att)
		return;
	if (entry)
		atomic64_or(DISTFUSE_WAITERS, df_word(entry));
	spin_lock(&di->lock);
	/* Who asked for more need not ask for less. */
	ask = !(di->need & ~((1U << mode) - 1));
	di->need |= 1U << mode;
	spin_unlock(&di->lock);
	if (!ask)
		return;
	post->event.type = DISTFUSE_EVENT_NEED;
	post->event.ino = di->ino;
	post->event.mode = mode;
	df_count(att, DISTFUSE_MISSES);
	df_post(att, post);
}

struct df_asked {
	struct df_inode	*di;
	u32		mode;
	u32		refusals;
};

/* Whether all that was asked for, in this mode or for more, has been answered. */
static bool df_answered(void *of)
{
	const struct df_asked *asked = of;

	return READ_ONCE(asked->di->refusals) != asked->refusals ||
	       !(READ_ONCE(asked->di->need) & ~((1U << asked->mode) - 1));
}

/* Waits until it is worth trying to enter again. */
int df_wait(struct df_inode *di, u32 mode)
{
	struct df_asked asked = { .di = di, .mode = mode, .refusals = READ_ONCE(di->refusals) };
	struct df_att *att = READ_ONCE(di->sb->att);
	u64 since = local_clock();

	df_ask(di, mode);
	/*
	 * The answer counts, also where the lease is there before: else it would come when nobody
	 * looks any more, and the daemon would have to ring for it. And also when it came without
	 * the lease, for that may have been granted and revoked before this task ran: then `need`
	 * is clear, and has to be set again.
	 */
	if (!att || !df_look(att, df_answered, &asked)) {
		df_count_sb(di->sb, DISTFUSE_WAITS);
		if (wait_event_killable(di->wq, df_is_dead(di->sb) || df_would_admit(di, mode) ||
					df_answered(&asked)))
			return -EINTR;
		if (att)
			df_slept(att, since);
	}
	if (df_is_dead(di->sb))
		return -ENOTCONN;
	if (READ_ONCE(di->refusals) != asked.refusals && !df_would_admit(di, mode))
		return READ_ONCE(di->refusal);
	return 0;
}

/*
 * Makes the grant that was entered the one that is installed. -EAGAIN if that cannot be done now.
 */
static int df_settle_in(struct df_inode *di, struct distfuse_entry *entry, bool nowait)
{
	u32 generation = df_generation(atomic64_read(df_word(entry)));
	int ret;

	/* Pairs with the release in df_install(). */
	if (generation == smp_load_acquire(&di->generation))
		return 0;
	if (!nowait) {
		ret = mutex_lock_killable(&di->install_lock);
		if (ret)
			return ret;
	} else if (!mutex_trylock(&di->install_lock)) {
		return -EAGAIN;
	}
	if (di->unsettled)
		ret = -EAGAIN;
	else if (generation == di->generation)
		ret = 0;
	else
		ret = df_install(di, entry, generation);
	mutex_unlock(&di->install_lock);
	return ret;
}

struct distfuse_entry *df_enter_slow(struct df_inode *di, u32 mode, u64 set, bool nowait)
{
	struct distfuse_entry *entry;
	int ret;

	for (;;) {
		if (df_is_dead(di->sb))
			return ERR_PTR(-ENOTCONN);
		entry = df_try(di, mode, set);
		if (entry) {
			ret = df_settle_in(di, entry, nowait);
			if (!ret)
				return entry;
			df_leave(di, entry);
			if (ret != -EAGAIN || nowait)
				return ERR_PTR(ret);
			ret = wait_event_killable(di->wq, !READ_ONCE(di->unsettled) ||
						  df_is_dead(di->sb));
		} else {
			if (nowait) {
				df_ask(di, mode);
				df_count_sb(di->sb, DISTFUSE_NOWAITS);
				return ERR_PTR(-EAGAIN);
			}
			ret = df_wait(di, mode);
		}
		if (ret)
			return ERR_PTR(ret);
	}
}

/*
 * Whether the lease is held and installed at this moment: enough for what is true of one moment,
 * and costs no write but the first time.
 */
bool df_held(struct df_inode *di, u32 mode, bool may_sleep)
{
	struct distfuse_entry *entry;
	struct df_glance glance;

	for (;;) {
		if (df_glance(di, mode, &glance) && df_in_term(di->sb))
			return true;
		if (!may_sleep || df_is_dead(di->sb) || !df_would_admit(di, mode))
			return false;
		/* Granted and not installed yet: going in and out again does it. */
		entry = df_enter_slow(di, mode, 0, true);
		if (IS_ERR(entry))
			return false;
		df_leave(di, entry);
	}
}

/* The last one inside is gone, and a revocation waits for that. */
void df_left_last(struct df_inode *di, u64 word)
{
	struct df_att *att = READ_ONCE(di->sb->att);

	/* A flush of ours may wait, too. */
	wake_up_all(&di->wq);
	if (!att)
		return;
	di->drained_post.event.type = DISTFUSE_EVENT_DRAINED;
	di->drained_post.event.ino = di->ino;
	df_count(att, DISTFUSE_DRAINS);
	df_post(att, &di->drained_post);
}
