// SPDX-License-Identifier: GPL-2.0
/*
 * The two rings. Indices are kept here and only shown in the shared page: what the daemon writes
 * there is taken for where it stands, never for where we do.
 */
#include "internal.h"
#include <linux/poll.h>

/* Where it does not pay, one in so many looks all the same. */
#define DF_SPIN_SELDOM	32

static u64 df_event_room(struct df_att *att)
{
	/* Pairs with the daemon's release: it has read what was there. */
	u64 used = att->event_head - smp_load_acquire(&att->shared->event_tail);

	return used > att->nr_events ? 0 : att->nr_events - used;
}

/* Moves what waits into the ring; whether anything was. With event_lock held. */
static bool df_pump(struct df_att *att)
{
	u64 head = att->event_head;
	struct df_post *post;

	while (!list_empty(&att->posts) && df_event_room(att)) {
		post = list_first_entry(&att->posts, struct df_post, link);
		att->events[att->event_head & (att->nr_events - 1)] = post->event;
		att->event_head++;
		list_del_init(&post->link);
		post->queued = false;
		if (post->owned)
			kfree(post);
	}
	/* Pairs with the daemon's acquire: the events are whole. */
	smp_store_release(&att->shared->event_head, att->event_head);
	if (READ_ONCE(att->shared->event_overflow) != !list_empty(&att->posts)) {
		WRITE_ONCE(att->shared->event_overflow, !list_empty(&att->posts));
		/* Room that was made while we looked: the daemon may not have seen the flag. */
		smp_mb();
		if (!list_empty(&att->posts) && df_event_room(att))
			df_pump(att);
	}
	return att->event_head != head;
}

/*
 * After the head was moved: either we see that the daemon is about to sleep, or it sees the head.
 */
static void df_notify(struct df_att *att)
{
	/* Pairs with the daemon's fence between its flag and its last look. */
	smp_mb();
	if (READ_ONCE(att->shared->event_need_wakeup) && xchg(&att->shared->event_need_wakeup, 0)) {
		df_count(att, DISTFUSE_WAKEUPS_MADE);
		wake_up_interruptible(&att->event_wq);
	} else {
		df_count(att, DISTFUSE_WAKEUPS_AVOIDED);
	}
}

/* Posts an event; one that waits in the list already is not posted twice. */
void df_post(struct df_att *att, struct df_post *post)
{
	bool moved;

	spin_lock(&att->event_lock);
	if (!post->queued && !att->dead) {
		post->queued = true;
		list_add_tail(&post->link, &att->posts);
	}
	moved = df_pump(att);
	if (post->queued)
		df_count(att, DISTFUSE_EVENTS_DELAYED);
	spin_unlock(&att->event_lock);
	if (moved)
		df_notify(att);
}

/* The memory of an event that may wait goes away; the event does not. */
void df_post_rescue(struct df_att *att, struct df_post *post)
{
	struct df_post *copy = NULL;

	if (!READ_ONCE(post->queued))
		return;
	copy = kmalloc(sizeof(*copy), GFP_NOFS | __GFP_NOFAIL);
	spin_lock(&att->event_lock);
	if (post->queued) {
		*copy = *post;
		copy->owned = true;
		list_replace(&post->link, &copy->link);
		post->queued = false;
		copy = NULL;
	}
	spin_unlock(&att->event_lock);
	kfree(copy);
}

__poll_t df_poll_events(struct df_att *att)
{
	if (READ_ONCE(att->shared->state) == DISTFUSE_STATE_GONE)
		return EPOLLHUP | EPOLLIN;
	if (READ_ONCE(att->event_head) != READ_ONCE(att->shared->event_tail))
		return EPOLLIN | EPOLLRDNORM;
	return 0;
}

/*
 * Nothing here sleeps or ends a mount: it may run on the only thread that answers the mount's
 * requests.
 */
static void df_command(struct df_att *att, const struct distfuse_command *command)
{
	struct df_sb *ds;

	switch (command->type) {
	case DISTFUSE_COMMAND_WAKE:
		rcu_read_lock();
		ds = READ_ONCE(att->sb);
		if (ds)
			df_wake(ds, command->ino, command->error);
		rcu_read_unlock();
		break;
	case DISTFUSE_COMMAND_FLUSH:
		df_flush_start(att, command);
		break;
	case DISTFUSE_COMMAND_ANSWER:
		df_call_answered(att, command);
		break;
	}
}

static bool df_has_commands(struct df_att *att)
{
	/* Pairs with the daemon's release: the commands are whole. */
	u64 count = smp_load_acquire(&att->shared->command_head) - READ_ONCE(att->command_tail);

	return count && count <= att->nr_commands;
}

/* With command_lock held. */
static void df_read_commands(struct df_att *att)
{
	struct distfuse_command command;

	while (df_has_commands(att)) {
		command = att->commands[att->command_tail & (att->nr_commands - 1)];
		WRITE_ONCE(att->command_tail, att->command_tail + 1);
		/* Pairs with the daemon's acquire: the slot is read. */
		smp_store_release(&att->shared->command_tail, att->command_tail);
		if (!READ_ONCE(att->dead))
			df_command(att, &command);
	}
}

/*
 * Carries out what is in the command ring. One at a time; whoever comes meanwhile is served by
 * it. The daemon need not ring while somebody is in df_look(), and the last one to leave that
 * comes here.
 */
void df_kick(struct df_att *att)
{
	struct distfuse_shared *shared = att->shared;
	bool moved;

	mutex_lock(&att->command_lock);
	do {
		WRITE_ONCE(shared->command_need_kick, 0);
		df_read_commands(att);
		if (!atomic_read(&att->lookers))
			WRITE_ONCE(shared->command_need_kick, 1);
		/* Pairs with the daemon's fence between its head and its look at the flag. */
		smp_mb();
	} while (df_has_commands(att));
	mutex_unlock(&att->command_lock);

	spin_lock(&att->event_lock);
	moved = df_pump(att);
	spin_unlock(&att->event_lock);
	if (moved)
		df_notify(att);
}

static void df_spin_learn(struct df_att *att, int change)
{
	WRITE_ONCE(att->spin_credit,
		   clamp(READ_ONCE(att->spin_credit) + change, -DF_SPIN_CREDIT, DF_SPIN_CREDIT));
}

/*
 * A task has slept for its answer: had it looked, it would have found one that took no longer
 * than this.
 */
void df_slept(struct df_att *att, u64 since)
{
	if (local_clock() - since < att->spin_ns)
		df_spin_learn(att, 1);
}

/* Looking has to pay more often than not; if it does not, it is tried only now and then. */
static bool df_is_worth_looking(struct df_att *att)
{
	if (!att->spin_ns || need_resched())
		return false;
	if (READ_ONCE(att->spin_credit) > 0)
		return true;
	att->spin_skipped++;
	return att->spin_skipped % DF_SPIN_SELDOM == 0;
}

/*
 * Looks for a while for an answer of the daemon, before the task sleeps. It reads the commands
 * meanwhile, also those for others: so neither has the daemon to ring, nor is a task to be woken.
 * Whether it came.
 */
bool df_look(struct df_att *att, bool (*done)(void *of), void *of)
{
	bool found = false;
	u64 end;

	if (!df_is_worth_looking(att))
		return false;
	end = local_clock() + att->spin_ns;
	atomic_inc(&att->lookers);
	WRITE_ONCE(att->shared->command_need_kick, 0);
	do {
		if (df_has_commands(att) && mutex_trylock(&att->command_lock)) {
			df_read_commands(att);
			mutex_unlock(&att->command_lock);
		}
		found = done(of);
		cpu_relax();
	} while (!found && !need_resched() && !READ_ONCE(att->dead) && local_clock() < end);
	/* Nobody is left: what came meanwhile, and the flag. */
	if (atomic_dec_and_test(&att->lookers))
		df_kick(att);
	if (!found)
		found = done(of);
	df_spin_learn(att, found ? 1 : -1);
	if (found)
		df_count(att, DISTFUSE_SPINS);
	return found;
}
