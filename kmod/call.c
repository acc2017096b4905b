// SPDX-License-Identifier: GPL-2.0
/*
 * Calls: short reads and writes that the daemon does itself, under its own lease, where nodes
 * take the lease from each other so fast that the kernel would get little out of having it.
 * Nothing is held meanwhile, and the page cache is not touched: the daemon does it while the
 * kernel has no lease on what it changes.
 *
 * And asking for space, which goes the same way but has no data (space.c). Its calls are apart
 * from the others, so that none that is long under way keeps a writer from asking.
 */
#include "internal.h"
#include <linux/capability.h>
#include <linux/uio.h>

static struct df_call *df_call_begin_among(struct df_att *att, u32 first, u32 end)
{
	struct df_call *call, *found = NULL;

	spin_lock(&att->call_lock);
	/* Pairs with df_calls_end(): either we see that it is over, or it sees us. */
	if (!READ_ONCE(att->dead))
		for (call = att->calls + first; call < att->calls + end; call++)
			if (!call->busy) {
				found = call;
				call->busy = true;
				call->answered = false;
				call->abandoned = false;
				reinit_completion(&call->done);
				break;
			}
	spin_unlock(&att->call_lock);
	return found;
}

static struct df_call *df_call_begin(struct df_att *att)
{
	return df_call_begin_among(att, 0, att->nr_buffers);
}

/* Waits for one if all are out. NULL: the daemon is gone; an error pointer: the task is killed. */
struct df_call *df_call_begin_space(struct df_att *att)
{
	struct df_call *call = NULL;
	int ret = wait_event_killable(att->call_wq,
				      (call = df_call_begin_among(att, att->nr_buffers,
								  att->nr_calls)) ||
				      READ_ONCE(att->dead));

	return ret ? ERR_PTR(ret) : call;
}

/* Somebody may wait for a call for space. */
static void df_call_freed(struct df_att *att, const struct df_call *call)
{
	if (call - att->calls >= att->nr_buffers)
		wake_up(&att->call_wq);
}

void df_call_end(struct df_att *att, struct df_call *call)
{
	spin_lock(&att->call_lock);
	call->busy = false;
	spin_unlock(&att->call_lock);
	df_call_freed(att, call);
}

/*
 * With call_lock held. The buffer of a task that was killed meanwhile has stayed the daemon's
 * until now.
 */
static void df_call_answer(struct df_call *call, u32 flags, int error, u64 result)
{
	if (!call->busy || call->answered)
		return;
	call->answered = true;
	call->flags = flags;
	call->error = error;
	call->result = result;
	if (call->abandoned)
		call->busy = false;
	else
		complete(&call->done);
}

void df_call_answered(struct df_att *att, const struct distfuse_command *command)
{
	struct df_call *call = att->calls + command->cookie;
	bool busy;

	if (command->cookie >= att->nr_calls)
		return;
	spin_lock(&att->call_lock);
	df_call_answer(call, command->flags, command->error, command->result);
	busy = call->busy;
	spin_unlock(&att->call_lock);
	if (!busy)
		df_call_freed(att, call);
}

/* The daemon is gone: nobody answers any more. */
void df_calls_end(struct df_att *att)
{
	u32 i;

	spin_lock(&att->call_lock);
	for (i = 0; i < att->nr_calls; i++)
		df_call_answer(att->calls + i, 0, -ENOTCONN, 0);
	spin_unlock(&att->call_lock);
	wake_up_all(&att->call_wq);
}

int df_calls_init(struct df_att *att, void *buffers, u32 count)
{
	u32 i, all = count + DISTFUSE_SPACE_CALLS;

	att->calls = kvcalloc(all, sizeof(*att->calls), GFP_KERNEL);
	if (!att->calls)
		return -ENOMEM;
	for (i = 0; i < all; i++) {
		INIT_LIST_HEAD(&att->calls[i].post.link);
		init_completion(&att->calls[i].done);
	}
	att->buffers = buffers;
	att->nr_buffers = count;
	att->nr_calls = all;
	return 0;
}

static bool df_call_done(void *of)
{
	return READ_ONCE(((struct df_call *)of)->answered);
}

/* Has the daemon answer; the call is over if that fails. */
int df_call_wait(struct df_att *att, struct df_call *call)
{
	u64 since = local_clock();
	bool found, over;
	int ret;

	df_post(att, &call->post);
	found = df_look(att, df_call_done, call);
	ret = wait_for_completion_killable(&call->done);
	if (!ret) {
		if (!found)
			df_slept(att, since);
		return 0;
	}
	spin_lock(&att->call_lock);
	over = call->answered;
	if (over)
		call->busy = false;
	else
		call->abandoned = true;
	spin_unlock(&att->call_lock);
	if (over)
		df_call_freed(att, call);
	return -EINTR;
}

static ssize_t df_call_result(struct df_call *call, void *buffer, struct iov_iter *it, size_t len,
			      bool write)
{
	size_t n = min_t(u64, call->result, len);
	size_t copied;

	if (call->error)
		return clamp(call->error, -MAX_ERRNO, -1);
	if (write) {
		iov_iter_revert(it, len - n);
		return n;
	}
	copied = copy_to_iter(buffer, n, it);
	if (n && !copied)
		return -EFAULT;
	return copied;
}

/*
 * Whether a read or write was done as a call, and what it came to. What must not wait, or has to
 * know the end of the file or reach storage by itself, is left to the ways through the lease.
 */
bool df_call(struct df_inode *di, struct kiocb *iocb, struct iov_iter *it, u32 mode, ssize_t *ret)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	struct distfuse_entry *entry = df_entry_of(di);
	bool write = mode == DISTFUSE_EXCLUSIVE;
	struct iov_iter start = *it;
	struct distfuse_event *event;
	struct df_call *call;
	void *buffer;
	size_t len;

	if (!att || !entry || !(READ_ONCE(entry->hints) & DISTFUSE_HINT_CALL))
		return false;
	if (!user_backed_iter(it) || iov_iter_count(it) > DISTFUSE_BUFFER_SIZE ||
	    iocb->ki_flags & (IOCB_NOWAIT | IOCB_APPEND) || iocb_is_dsync(iocb) ||
	    df_would_admit(di, mode))
		return false;
	if (write) {
		*ret = generic_write_checks(iocb, it);
		if (*ret <= 0)
			return true;
	}
	len = iov_iter_count(it);
	if (!len)
		return false;
	call = df_call_begin(att);
	if (!call)
		return false;
	buffer = att->buffers + (call - att->calls) * DISTFUSE_BUFFER_SIZE;
	if (write && copy_from_iter(buffer, len, it) != len) {
		*it = start;
		df_call_end(att, call);
		return false;
	}
	event = &call->post.event;
	memset(event, 0, sizeof(*event));
	event->type = DISTFUSE_EVENT_CALL;
	event->ino = di->ino;
	event->cookie = call - att->calls;
	event->mode = len;
	event->size = iocb->ki_pos;
	if (write) {
		event->flags = DISTFUSE_CALL_WRITE;
		if (!capable(CAP_FSETID))
			event->flags |= DISTFUSE_CALL_KILL_PRIV;
	}
	df_count(att, DISTFUSE_CALLS);
	*ret = df_call_wait(att, call);
	if (*ret)
		return true;
	if (!call->error && call->flags & DISTFUSE_ANSWER_AGAIN) {
		df_count(att, DISTFUSE_CALLS_AGAIN);
		*it = start;
		df_call_end(att, call);
		return false;
	}
	*ret = df_call_result(call, buffer, it, len, write);
	df_call_end(att, call);
	if (*ret > 0)
		iocb->ki_pos += *ret;
	return true;
}
