// SPDX-License-Identifier: GPL-2.0
/* Entrances through open files. */
#include "internal.h"
#include <linux/fadvise.h>
#include <linux/sizes.h>
#include <linux/uaccess.h>
#include <linux/uio.h>

/* So much of a buffer is made present at a time; what is longer may be done in parts. */
#define DF_BUFFER	((size_t)SZ_1M)
/* So often a read begins anew. */
#define DF_BEGINNINGS	3
#define DF_PAGES	16
/* And so often a write asks for space before it is tried: where an append goes is a guess then. */
#define DF_ASK_AHEAD	3

static struct df_sb *df_of_fop(const struct file *file)
{
	return container_of(READ_ONCE(file->f_op), struct df_sb, fop);
}

/* The lease of the file's inode, which was given its private part when it was opened. */
static struct distfuse_entry *df_enter_file(struct file *file, u32 mode, u64 set)
{
	struct df_inode *di = df_i(file_inode(file));

	if (unlikely(!di))
		return ERR_PTR(-ENOMEM);
	return df_enter(di, mode, set);
}

static void df_leave_file(struct file *file, struct distfuse_entry *entry)
{
	df_leave(df_i(file_inode(file)), entry);
}

/* Enters, or has the daemon do it all: then there is no entry, and *ret is what it came to. */
static struct distfuse_entry *df_enter_or_call(struct kiocb *iocb, struct iov_iter *it, u32 mode,
					       u64 set, ssize_t *ret)
{
	struct df_inode *di = df_i(file_inode(iocb->ki_filp));
	struct distfuse_entry *entry;

	if (unlikely(!di))
		return ERR_PTR(-ENOMEM);
	entry = df_enter_fast(di, mode, set);
	if (likely(entry)) {
		df_count_sb(di->sb, DISTFUSE_HITS);
		return entry;
	}
	if (df_call(di, iocb, it, mode, ret))
		return NULL;
	return df_enter_slow(di, mode, set, iocb->ki_flags & IOCB_NOWAIT);
}

static int df_open(struct inode *inode, struct file *file)
{
	struct df_sb *ds = df_of_fop(file);
	struct df_inode *di = df_inode_get(ds, inode);
	struct df_settling settling;
	int ret;

	if (!di)
		return -ENOMEM;
	if (file->f_flags & O_TRUNC)
		df_unsettle(di, &settling);
	ret = ds->stock_fop->open(inode, file);
	if (file->f_flags & O_TRUNC)
		df_settle(di, &settling);
	if (!ret)
		df_file_track(di, file);
	return ret;
}

static int df_release(struct inode *inode, struct file *file)
{
	struct df_sb *ds = df_of_fop(file);
	struct df_inode *di = df_i(inode);
	int ret = ds->stock_fop->release(inode, file);

	if (di)
		df_file_untrack(di, file);
	return ret;
}

/*
 * Makes a buffer that is read into present; false if not even its beginning can be. The kernel's
 * own way, fault_in_iov_iter_writeable(), holds the address space locked while it waits on some
 * kernels, which stops all threads of a process that one waits in.
 */
static bool df_make_writeable(const struct iov_iter *to, size_t want)
{
	struct page *pages[DF_PAGES];
	struct iov_iter it = *to;
	bool some = false;
	ssize_t got;
	size_t start;
	int i, n;

	while (want) {
		got = iov_iter_get_pages2(&it, pages, want, DF_PAGES, &start);
		if (got <= 0)
			break;
		n = DIV_ROUND_UP(start + got, PAGE_SIZE);
		for (i = 0; i < n; i++)
			put_page(pages[i]);
		want -= min_t(size_t, got, want);
		some = true;
	}
	return some;
}

/* Whether what stopped a write is that space for the rest has to be asked for. */
static bool df_lacks_space(struct kiocb *iocb, struct iov_iter *from, ssize_t ret)
{
	size_t page_left = PAGE_SIZE - offset_in_page(iocb->ki_pos);
	struct distfuse_entry *entry;

	if (ret <= 0)
		return ret == DF_NO_SPACE;
	/*
	 * Stopped after some of it: a hint will do, for what is covered now goes on without
	 * asking.
	 */
	entry = df_entry_of(df_i(file_inode(iocb->ki_filp)));
	return entry && !df_space_covers(entry, iocb->ki_pos,
					 min_t(size_t, iov_iter_count(from), page_left));
}

/*
 * Whether space had better be asked for before anything is written: what is stopped half way for
 * it, with the lease left meanwhile, others see half of. Where an append goes is a guess, which
 * is right unless another task of this node appends as well.
 */
static bool df_lacks_space_ahead(struct kiocb *iocb, struct iov_iter *from,
				 struct distfuse_entry *entry, loff_t *pos)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	size_t len = min_t(size_t, iov_iter_count(from), DF_BUFFER);

	*pos = iocb->ki_flags & IOCB_APPEND ? i_size_read(inode) : iocb->ki_pos;
	if (likely(offset_in_page(*pos) + len <= PAGE_SIZE))
		return false;
	return *pos <= inode->i_sb->s_maxbytes - (loff_t)len && !df_space_covers(entry, *pos, len);
}

/*
 * No page fault may be taken inside: a buffer that is a mapping of a leased file would wait for
 * its lease with this one held. So the original runs with faults disabled; where it comes to a
 * page that is not there, the lease is left, the buffer made present, and another round begun. A
 * read begins anew, so that all it returns is of one moment; unless it is very long, or its
 * buffer goes as fast as it comes.
 */
static ssize_t df_read_entered(struct kiocb *iocb, struct iov_iter *to)
{
	struct file *file = iocb->ki_filp;
	struct df_sb *ds = df_of_fop(file);
	bool user = user_backed_iter(to);
	struct iov_iter start = *to;
	loff_t pos = iocb->ki_pos;
	struct distfuse_entry *entry;
	ssize_t ret, done = 0;
	int again = 0;
	bool in_term;
	size_t want;

	for (;;) {
		entry = df_enter_or_call(iocb, to, DISTFUSE_SHARED, 0, &ret);
		if (!entry)
			return ret > 0 ? done + ret : done ?: ret;
		if (IS_ERR(entry))
			return done ?: PTR_ERR(entry);
		if (user)
			pagefault_disable();
		ret = generic_file_read_iter(iocb, to);
		if (user)
			pagefault_enable();
		in_term = df_in_term(ds);
		df_leave_file(file, entry);
		if (unlikely(ret >= 0 && !in_term)) {
			/* It may have slept: others may have written meanwhile. Entering waits. */
			iov_iter_revert(to, iov_iter_count(&start) - iov_iter_count(to));
			iocb->ki_pos = pos;
			continue;
		}
		if (likely(!user || !iov_iter_count(to)) || !ret || (ret < 0 && ret != -EFAULT))
			break;
		if (ret > 0 && iocb->ki_pos >= i_size_read(file_inode(file)))
			break;
		if (iocb->ki_flags & IOCB_NOWAIT) {
			ret = ret > 0 ? ret : -EAGAIN;
			break;
		}
		want = min_t(size_t, iov_iter_count(&start), DF_BUFFER);
		if (ret >= (ssize_t)want || (ret > 0 && ++again > DF_BEGINNINGS)) {
			done += ret;
			start = *to;
			pos = iocb->ki_pos;
			want = min_t(size_t, iov_iter_count(to), DF_BUFFER);
			again = 0;
		} else {
			*to = start;
			iocb->ki_pos = pos;
		}
		df_count_sb(ds, DISTFUSE_BUFFER_FAULTS);
		if (!df_make_writeable(to, want)) {
			ret = -EFAULT;
			break;
		}
	}
	return ret > 0 ? done + ret : done ?: ret;
}

static ssize_t df_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	ssize_t ret;

	/*
	 * The page cache is as good as the server under a lease; past it both would have to be
	 * kept right.
	 */
	iocb->ki_flags &= ~IOCB_DIRECT;
	if (likely(df_read_cached(iocb, to, &ret)))
		return ret;
	return df_read_entered(iocb, to);
}

/* So much of a write is done as one, if there is space for it. */
size_t df_in_one(const struct iov_iter *from)
{
	return min_t(size_t, iov_iter_count(from), DF_BUFFER);
}

/* Whether it was answered that there is space for some of a write and for no more. */
static bool df_is_short(ssize_t space, const struct iov_iter *from)
{
	return space > 0 && space < (ssize_t)df_in_one(from);
}

static ssize_t df_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct file *file = iocb->ki_filp;
	struct df_sb *ds = df_of_fop(file);
	bool user = user_backed_iter(from);
	struct distfuse_entry *entry;
	ssize_t ret, done = 0;
	struct df_whole whole;
	bool in_parts = false;
	int asked = 0;
	loff_t pos;

	iocb->ki_flags &= ~IOCB_DIRECT;
	/*
	 * The kernel takes it for an invalid wish without the other flag; what may wait is done
	 * elsewhere then.
	 */
	if (iocb->ki_flags & IOCB_NOWAIT)
		return -EAGAIN;
	/* What is done is done: so that it is done in one, the buffer is made present before. */
	if (user)
		fault_in_iov_iter_readable(from, df_in_one(from));
	for (;;) {
		entry = df_enter_or_call(iocb, from, DISTFUSE_EXCLUSIVE, DISTFUSE_DIRTY, &ret);
		if (!entry)
			return ret > 0 ? done + ret : done ?: ret;
		if (IS_ERR(entry))
			return done ?: PTR_ERR(entry);
		if (df_write_page(iocb, from, &ret)) {
			df_leave_file(file, entry);
			return done + ret;
		}
		if (!done && !in_parts && asked < DF_ASK_AHEAD &&
		    df_lacks_space_ahead(iocb, from, entry, &pos)) {
			df_leave_file(file, entry);
			asked++;
			ret = df_space_ask(df_i(file_inode(file)), pos, iov_iter_count(from));
			/*
			 * Not enough, or an error: as much is written as there is space for, and
			 * asked for the rest.
			 */
			in_parts = ret < 0 || df_is_short(ret, from);
			continue;
		}
		df_whole_begin(df_i(file_inode(file)), &whole, in_parts ? NULL : from);
		if (user)
			pagefault_disable();
		if (!df_write_pages(iocb, from, &ret))
			ret = ds->stock_fop->write_iter(iocb, from);
		if (user)
			pagefault_enable();
		df_whole_end(df_i(file_inode(file)), &whole);
		df_leave_file(file, entry);
		if (ret > 0)
			done += ret;
		if (likely(!iov_iter_count(from)) || !ret)
			break;
		if (df_lacks_space(iocb, from, ret)) {
			ret = df_space_ask(df_i(file_inode(file)), iocb->ki_pos,
					   iov_iter_count(from));
			if (ret < 0)
				break;
			in_parts = in_parts || df_is_short(ret, from);
			continue;
		}
		if (ret < 0 && (!user || ret != -EFAULT))
			break;
		if (!user)
			continue;
		df_count_sb(ds, DISTFUSE_BUFFER_FAULTS);
		if (fault_in_iov_iter_readable(from, df_in_one(from)) == df_in_one(from)) {
			ret = -EFAULT;
			break;
		}
	}
	return done ?: ret;
}

#if DF_SPLICE_OWN
static ssize_t df_splice_read(struct file *file, loff_t *pos, struct pipe_inode_info *pipe,
			      size_t len, unsigned int flags)
{
	struct df_sb *ds = df_of_fop(file);
	struct distfuse_entry *entry = df_enter_file(file, DISTFUSE_SHARED, 0);
	ssize_t ret;

	if (IS_ERR(entry))
		return PTR_ERR(entry);
	ret = ds->stock_fop->splice_read(file, pos, pipe, len, flags);
	df_leave_file(file, entry);
	return ret;
}
#endif

/*
 * Holes and data are the server's to tell, which knows nothing of what it has not got yet; FUSE
 * does not wait for that. Without a lease, for FUSE locks the inode, and whoever has it locked
 * may wait for one.
 */
static loff_t df_seek_data(struct df_sb *ds, struct file *file, loff_t offset, int whence)
{
	struct df_inode *di = df_i(file_inode(file));
	struct distfuse_entry *entry = di ? df_entry_of(di) : NULL;
	int ret;

	if (entry && atomic64_read(df_word(entry)) & DISTFUSE_DIRTY) {
		/* As an owner of locks that has none. */
		ret = ds->stock_fop->flush(file, (fl_owner_t)di);
		if (ret)
			return ret;
	}
	return ds->stock_fop->llseek(file, offset, whence);
}

static loff_t df_llseek(struct file *file, loff_t offset, int whence)
{
	struct df_sb *ds = df_of_fop(file);
	struct distfuse_entry *entry;
	bool in_term;
	loff_t ret;

	if (whence == SEEK_DATA || whence == SEEK_HOLE)
		return df_seek_data(ds, file, offset, whence);
	if (whence != SEEK_END)
		return ds->stock_fop->llseek(file, offset, whence);
	do {
		entry = df_enter_file(file, DISTFUSE_SHARED, 0);
		if (IS_ERR(entry))
			return PTR_ERR(entry);
		/* FUSE would ask its server, for the size that is known here. */
		ret = generic_file_llseek(file, offset, whence);
		in_term = df_in_term(ds);
		df_leave_file(file, entry);
	} while (unlikely(!in_term));
	return ret;
}

static long df_fallocate(struct file *file, int mode, loff_t offset, loff_t length)
{
	struct df_sb *ds = df_of_fop(file);
	struct distfuse_entry *entry = df_enter_file(file, DISTFUSE_EXCLUSIVE, DISTFUSE_DIRTY);
	long ret;

	if (IS_ERR(entry))
		return PTR_ERR(entry);
	ret = ds->stock_fop->fallocate(file, mode, offset, length);
	df_leave_file(file, entry);
	return ret;
}

/* Reading ahead is reading. */
static int df_fadvise(struct file *file, loff_t offset, loff_t length, int advice)
{
	struct distfuse_entry *entry;
	int ret;

	if (advice != POSIX_FADV_WILLNEED)
		return generic_fadvise(file, offset, length, advice);
	entry = df_enter_file(file, DISTFUSE_SHARED, 0);
	if (IS_ERR(entry))
		return PTR_ERR(entry);
	ret = generic_fadvise(file, offset, length, advice);
	df_leave_file(file, entry);
	return ret;
}

static int df_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct df_sb *ds = df_of_fop(file);
	int ret = ds->stock_fop->mmap(file, vma);

	if (!ret && vma->vm_ops)
		vma->vm_ops = df_vmop(ds, vma->vm_ops);
	return ret;
}

void df_make_fop(struct df_sb *ds, const struct file_operations *stock)
{
	ds->fop = *stock;
	ds->fop.open = df_open;
	ds->fop.release = df_release;
	ds->fop.read_iter = df_read_iter;
	ds->fop.write_iter = df_write_iter;
#if DF_SPLICE_OWN
	ds->fop.splice_read = df_splice_read;
#endif
	ds->fop.llseek = df_llseek;
	ds->fop.fallocate = df_fallocate;
	ds->fop.fadvise = df_fadvise;
	ds->fop.mmap = df_mmap;
	/* Two leases at a time would need an order; read and write by turns need none. */
	ds->fop.copy_file_range = NULL;
	/* Pairs with the acquire in df_adopt(): this table and that of inodes are whole. */
	smp_store_release(&ds->stock_fop, stock);
}
