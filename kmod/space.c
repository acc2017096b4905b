// SPDX-License-Identifier: GPL-2.0
/*
 * Space: nothing goes into the page cache that the daemon has not promised to be able to store,
 * so that a full pool is told of by write(2) and not when it is too late. What is promised stands
 * in the entry, and holds as long as the exclusive lease; the rest is asked for with nothing
 * held.
 *
 * The look at the entry is taken where a page is about to be written to, and not before: there
 * the inode is locked, so neither the end of the file, which an append does not know earlier, nor
 * what a truncation or a hole takes out of the range can change any more.
 */
#include "internal.h"
#include <linux/hash.h>
#include <linux/pagemap.h>

/* Tries of a copy that the daemon may be changing. One too few costs a question. */
#define DF_SPACE_TRIES	1000
/* A fault that was refused comes again at once, or not at all. */
#define DF_REFUSED_FOR	(5 * HZ)

static struct df_sb *df_of_aops(const struct address_space *mapping)
{
	return container_of(READ_ONCE(mapping->a_ops), struct df_sb, aops);
}

/* With the exclusive lease entered; else it is a hint. */
bool df_space_covers(const struct distfuse_entry *entry, u64 pos, u64 len)
{
	u64 from, to;
	int tries;
	u32 seq;

	for (tries = 0; tries < DF_SPACE_TRIES; tries++) {
		/* Pairs with the daemon's release at the end of a change. */
		seq = smp_load_acquire(&entry->seq);
		if (!(seq & 1)) {
			from = READ_ONCE(entry->space_from);
			to = READ_ONCE(entry->space_to);
			/* Pairs with the daemon's fence at the beginning of one. */
			smp_rmb();
			if (READ_ONCE(entry->seq) == seq)
				return pos >= from && pos <= to && to - pos >= len;
		}
		cpu_relax();
	}
	return false;
}

/*
 * Asks for space for at least the beginning of what is to be written; with it comes the lease, if
 * that has gone. For so many bytes there is some; 0: it is worth trying again. Nothing may be
 * held: the daemon may have to take leases back for it.
 */
int df_space_ask(struct df_inode *di, u64 pos, u64 len)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	struct distfuse_event *event;
	struct df_call *call;
	int ret;

	if (!att)
		return -ENOTCONN;
	call = df_call_begin_space(att);
	if (IS_ERR(call))
		return -EINTR;
	if (!call)
		return -ENOTCONN;
	event = &call->post.event;
	memset(event, 0, sizeof(*event));
	event->type = DISTFUSE_EVENT_CALL;
	event->flags = DISTFUSE_CALL_SPACE;
	event->ino = di->ino;
	event->cookie = call - att->calls;
	event->mode = min_t(u64, len, U32_MAX);
	event->size = pos;
	df_count(att, DISTFUSE_SPACE_ASKED);
	ret = df_call_wait(att, call);
	if (ret)
		return ret;
	if (call->error)
		ret = clamp(call->error, -MAX_ERRNO, -1);
	else if (!(call->flags & DISTFUSE_ANSWER_AGAIN))
		ret = call->result ? min_t(u64, call->result, INT_MAX) : -ENOSPC;
	df_call_end(att, call);
	return ret;
}

void df_whole_begin(struct df_inode *di, struct df_whole *whole, const struct iov_iter *from)
{
	whole->task = current;
	whole->from = from;
	spin_lock(&di->lock);
	list_add(&whole->link, &di->wholes);
	spin_unlock(&di->lock);
}

void df_whole_end(struct df_inode *di, struct df_whole *whole)
{
	spin_lock(&di->lock);
	list_del(&whole->link);
	spin_unlock(&di->lock);
}

/*
 * Whether there is space for a page that is about to be written, and at the first page of a write
 * for all of it: one that stopped behind its first page to ask for space would leave the lease and
 * the inode's lock half done. Others would see half of it, and an append would go on at the end
 * that another one has made meanwhile.
 */
static bool df_covered(struct df_inode *di, const struct distfuse_entry *entry, loff_t pos,
		       size_t len)
{
	struct df_whole *whole;
	bool covered;

	/* This task has put its own there, and sees it without the lock. */
	if (list_empty(&di->wholes))
		return df_space_covers(entry, pos, len);
	spin_lock(&di->lock);
	list_for_each_entry(whole, &di->wholes, link)
		if (whole->task == current)
			break;
	if (list_entry_is_head(whole, &di->wholes, link)) {
		covered = df_space_covers(entry, pos, len);
	} else {
		if (whole->from)
			len = max(len, df_in_one(whole->from));
		covered = df_space_covers(entry, pos, len);
		if (covered)
			whole->from = NULL;
	}
	spin_unlock(&di->lock);
	return covered;
}

static int df_write_begin(struct file *file, struct address_space *mapping, loff_t pos,
			  unsigned int len, df_written **written, void **fsdata)
{
	struct df_sb *ds = df_of_aops(mapping);
	struct df_inode *di = df_i(mapping->host);
	struct distfuse_entry *entry = di ? READ_ONCE(di->entry) : NULL;
	int ret;

	/* What is past the term goes the same way: the daemon answers when it may act again. */
	if (unlikely(!entry || !df_in_term(ds) || !df_covered(di, entry, pos, len)))
		return DF_NO_SPACE;
	ret = ds->stock_aops->write_begin(file, mapping, pos, len, written, fsdata);
	if (unlikely(!ret && !df_in_term(ds))) {
		/* It has slept for what is in the page already. As if nothing could be copied. */
		ds->stock_aops->write_end(file, mapping, pos, len, 0, *written, *fsdata);
		ret = DF_NO_SPACE;
	}
	return ret;
}

/*
 * Whether a page that is mapped may be written to. What lies behind the end of the file FUSE
 * refuses.
 */
bool df_space_for_page(const struct df_inode *di, const struct distfuse_entry *entry, pgoff_t page)
{
	u64 pos = (u64)page << PAGE_SHIFT;

	return pos >= i_size_read(di->inode) || df_space_covers(entry, pos, PAGE_SIZE);
}

static struct df_refused *df_refused_of(struct df_att *att)
{
	return att->refused + hash_ptr(current, DF_REFUSED_BITS);
}

static void df_refuse_fault(struct df_att *att, struct df_inode *di, pgoff_t page)
{
	struct df_refused *refused = df_refused_of(att);

	spin_lock(&att->call_lock);
	refused->task = current;
	refused->inode = di->inode;
	refused->page = page;
	refused->when = jiffies;
	spin_unlock(&att->call_lock);
}

/*
 * Once only: the next access asks again. Another task's refusal in its place costs one more
 * question.
 */
static bool df_fault_refused(struct df_att *att, struct df_inode *di, pgoff_t page)
{
	struct df_refused *refused = df_refused_of(att);
	bool is;

	spin_lock(&att->call_lock);
	is = refused->task == current && refused->inode == di->inode && refused->page == page;
	if (is)
		refused->task = NULL;
	is = is && time_before(jiffies, refused->when + DF_REFUSED_FOR);
	spin_unlock(&att->call_lock);
	return is;
}

/*
 * A page fault to write where there may be no space. As with leases it is waited for without the
 * lock that the fault came with, after which all that can be said is that it is to be taken
 * again; so that it was refused is kept for then.
 */
vm_fault_t df_space_fault(struct vm_fault *vmf, struct df_inode *di)
{
	struct df_att *att = READ_ONCE(di->sb->att);
	u64 pos = (u64)vmf->pgoff << PAGE_SHIFT;
	pgoff_t page = vmf->pgoff;
	struct file *file;
	int ret;

	if (!att)
		return VM_FAULT_SIGBUS;
	if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
		return df_space_ask(di, pos, PAGE_SIZE) < 0 ? VM_FAULT_SIGBUS : VM_FAULT_NOPAGE;
	if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT)
		return VM_FAULT_RETRY;
	if ((vmf->flags & FAULT_FLAG_TRIED) && df_fault_refused(att, di, page))
		return VM_FAULT_SIGBUS;
	df_count_sb(di->sb, DISTFUSE_FAULT_RETRIES);
	file = get_file(vmf->vma->vm_file);
	df_release_fault_lock(vmf);
	ret = df_space_ask(di, pos, PAGE_SIZE);
	if (ret < 0 && ret != -EINTR)
		df_refuse_fault(att, di, page);
	fput(file);
	return VM_FAULT_RETRY;
}

void df_make_aops(struct df_sb *ds, const struct address_space_operations *stock)
{
	ds->aops = *stock;
	ds->aops.write_begin = df_write_begin;
	/* Before the table of file operations, whose being there says that all are. */
	ds->stock_aops = stock;
}
