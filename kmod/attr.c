// SPDX-License-Identifier: GPL-2.0
/*
 * Attributes: stat and permission checks under a lease, and setattr, which changes the size
 * without one.
 */
#include "internal.h"
#include <linux/posix_acl.h>
#include <linux/user_namespace.h>

static struct df_sb *df_of_riop(const struct inode *inode)
{
	return container_of(READ_ONCE(inode->i_op), struct df_sb, riop);
}

static struct df_sb *df_of_diop(const struct inode *inode)
{
	return container_of(READ_ONCE(inode->i_op), struct df_sb, diop);
}

static bool df_wants(struct df_sb *ds, u32 flag)
{
	struct df_att *att = READ_ONCE(ds->att);

	return att && (att->flags & flag);
}

/*
 * The blocks of a file, which programs take for one without data if it has none: what is dirty in
 * the page cache will have some, and the server does not know of it. Of a page that is in the
 * cache it is not looked whether it is dirty.
 */
static u64 df_blocks(const struct distfuse_entry *e, const struct inode *inode, u64 size)
{
	u64 cached = (u64)READ_ONCE(inode->i_mapping->nrpages) << (PAGE_SHIFT - 9);

	if (!(e->word & DISTFUSE_DIRTY))
		return e->blocks;
	return max(e->blocks, min(cached, DIV_ROUND_UP_ULL(size, 512)));
}

/*
 * Fills in what the daemon keeps in the entry. Size and times of a file are the kernel's, once
 * installed.
 */
static bool df_stat_from(struct distfuse_entry *entry, df_idmap *idmap, u32 mask,
			 struct inode *inode, struct kstat *stat)
{
	struct distfuse_entry e;
	kuid_t uid;
	kgid_t gid;

	if (!df_read_entry(entry, &e) || !(e.valid & DISTFUSE_ATTR_ALL))
		return false;
	uid = make_kuid(inode->i_sb->s_user_ns, e.uid);
	gid = make_kgid(inode->i_sb->s_user_ns, e.gid);
	if (!uid_valid(uid) || !gid_valid(gid))
		return false;
	df_fillattr(idmap, mask, inode, stat);
	stat->mode = (inode->i_mode & S_IFMT) | (e.mode & 07777);
	stat->nlink = e.nlink;
	stat->uid = uid;
	stat->gid = gid;
	stat->atime.tv_sec = e.atime;
	stat->atime.tv_nsec = min(e.atime_nsec, 999999999U);
	stat->blocks = e.blocks;
	if (S_ISREG(inode->i_mode) && (e.valid & DISTFUSE_ATTR_DATA)) {
		stat->blocks = df_blocks(&e, inode, stat->size);
	} else {
		stat->size = e.size;
		stat->mtime.tv_sec = e.mtime;
		stat->mtime.tv_nsec = min(e.mtime_nsec, 999999999U);
		stat->ctime.tv_sec = e.ctime;
		stat->ctime.tv_nsec = min(e.ctime_nsec, 999999999U);
	}
	return true;
}

/*
 * FUSE shows the mode as its server told it last, and not the inode's: what came with a grant, or
 * under one that is held, has not reached it. Blocks it shows as they were told, too. All else it
 * shows is the inode's, where df_install() has put it.
 */
static void df_show_entry(struct distfuse_entry *entry, const struct inode *inode,
			  struct kstat *stat)
{
	struct distfuse_entry e;

	if (!df_read_entry(entry, &e) || !(e.valid & DISTFUSE_ATTR_ALL))
		return;
	stat->mode = (inode->i_mode & S_IFMT) | (e.mode & 07777);
	stat->blocks = df_blocks(&e, inode, stat->size);
}

/*
 * Without entering, which would have all that look at a file write its word: nothing here sleeps,
 * and if the lease was held before and still is, then so it was all the while.
 */
static bool df_stat_local(struct df_sb *ds, struct df_inode *di, df_idmap *idmap, u32 mask,
			  unsigned int flags, struct kstat *stat)
{
	struct df_glance glance;

	if ((flags & AT_STATX_FORCE_SYNC) || !df_wants(ds, DISTFUSE_ATTACH_STAT) ||
	    !df_glance(di, DISTFUSE_SHARED, &glance) ||
	    !df_stat_from(glance.entry, idmap, mask, di->inode, stat) ||
	    !df_glance_holds(di, &glance))
		return false;
	df_count_sb(ds, DISTFUSE_STAT_LOCAL);
	return true;
}

/*
 * Of a regular file only under a lease, for FUSE in write-back mode believes its own size and
 * times, whatever the server says.
 */
static int df_file_getattr(df_idmap *idmap, const struct path *path, struct kstat *stat, u32 mask,
			   unsigned int flags)
{
	struct inode *inode = d_inode(path->dentry);
	struct df_sb *ds = df_of_riop(inode);
	struct df_inode *di = df_inode_get(ds, inode);
	struct distfuse_entry *entry;
	bool in_term;
	int ret;

	if (!di)
		return -ENOMEM;
	if (flags & AT_STATX_DONT_SYNC)
		return ds->stock_riop->getattr(idmap, path, stat, mask, flags);
	do {
		if (likely(df_stat_local(ds, di, idmap, mask, flags, stat)))
			return 0;
		entry = df_enter(di, DISTFUSE_SHARED, 0);
		if (IS_ERR(entry))
			return PTR_ERR(entry);
		ret = 0;
		if ((flags & AT_STATX_FORCE_SYNC) || !df_wants(ds, DISTFUSE_ATTACH_STAT) ||
		    !df_stat_from(entry, idmap, mask, inode, stat)) {
			df_count_sb(ds, DISTFUSE_STAT_REMOTE);
			ret = ds->stock_riop->getattr(idmap, path, stat, mask, flags);
			if (!ret)
				df_show_entry(entry, inode, stat);
		} else {
			df_count_sb(ds, DISTFUSE_STAT_LOCAL);
		}
		in_term = df_in_term(ds);
		df_leave(di, entry);
	} while (unlikely(!ret && !in_term));
	return ret;
}

/* Of a directory FUSE believes the server, so without a lease that is asked. */
static int df_dir_getattr(df_idmap *idmap, const struct path *path, struct kstat *stat, u32 mask,
			  unsigned int flags)
{
	struct inode *inode = d_inode(path->dentry);
	struct df_sb *ds = df_of_diop(inode);
	struct df_inode *di = df_inode_get(ds, inode);

	if (di && df_held(di, DISTFUSE_SHARED, true) &&
	    df_stat_local(ds, di, idmap, mask, flags, stat))
		return 0;
	df_count_sb(ds, DISTFUSE_STAT_REMOTE);
	return ds->stock_diop->getattr(idmap, path, stat, mask, flags);
}

/* FUSE asks its server when attributes have expired, which with a lease they have not. */
static bool df_permission_local(struct df_sb *ds, struct inode *inode, int mask)
{
	struct df_inode *di = df_i(inode);
	struct distfuse_entry *entry;

	if (!di || !df_wants(ds, DISTFUSE_ATTACH_ACCESS) ||
	    !df_held(di, DISTFUSE_SHARED, !(mask & MAY_NOT_BLOCK)))
		return false;
	entry = READ_ONCE(di->entry);
	return entry && (READ_ONCE(entry->valid) & DISTFUSE_ATTR_ALL);
}

/*
 * The attributes of a regular file have a long time to live, for else FUSE would ask for them at
 * every write; without a lease they are anybody's guess, so that is waited for. Not with the
 * inode locked, which the callers that set extended attributes have done: they get the stock
 * driver's answer.
 */
static int df_file_permission(df_idmap *idmap, struct inode *inode, int mask)
{
	struct df_sb *ds = df_of_riop(inode);
	struct distfuse_entry *entry;
	struct df_inode *di;
	int ret;

	if (df_permission_local(ds, inode, mask)) {
		df_count_sb(ds, DISTFUSE_PERMISSION_LOCAL);
		return generic_permission(idmap, inode, mask);
	}
	if (!df_wants(ds, DISTFUSE_ATTACH_ACCESS))
		return ds->stock_riop->permission(idmap, inode, mask);
	if (mask & MAY_NOT_BLOCK)
		return -ECHILD;
	di = df_inode_get(ds, inode);
	if (!di || inode_is_locked(inode))
		return ds->stock_riop->permission(idmap, inode, mask);
	entry = df_enter(di, DISTFUSE_SHARED, 0);
	if (IS_ERR(entry))
		return PTR_ERR(entry);
	ret = generic_permission(idmap, inode, mask);
	df_leave(di, entry);
	return ret;
}

static int df_dir_permission(df_idmap *idmap, struct inode *inode, int mask)
{
	struct df_sb *ds = df_of_diop(inode);

	if (!df_permission_local(ds, inode, mask))
		return ds->stock_diop->permission(idmap, inode, mask);
	df_count_sb(ds, DISTFUSE_PERMISSION_LOCAL);
	return generic_permission(idmap, inode, mask);
}

/*
 * Comes with the inode locked, where no lease may be waited for: a flush wants the inode's lock
 * to end the lease that is asked for. Without the lease the daemon takes it itself.
 */
static int df_setattr(df_idmap *idmap, struct dentry *dentry, struct iattr *attr)
{
	struct inode *inode = d_inode(dentry);
	struct df_sb *ds = df_of_riop(inode);
	struct df_inode *di = df_inode_get(ds, inode);
	struct distfuse_entry *entry;
	struct df_settling settling;
	int ret;

	if (!di)
		return -ENOMEM;
	entry = df_enter_fast(di, DISTFUSE_EXCLUSIVE, 0);
	if (entry) {
		ret = ds->stock_riop->setattr(idmap, dentry, attr);
		df_leave(di, entry);
		return ret;
	}
	df_unsettle(di, &settling);
	ret = ds->stock_riop->setattr(idmap, dentry, attr);
	df_settle(di, &settling);
	return ret;
}

void df_make_riop(struct df_sb *ds, const struct inode_operations *stock)
{
	ds->riop = *stock;
	ds->riop.getattr = df_file_getattr;
	ds->riop.setattr = df_setattr;
	ds->riop.permission = df_file_permission;
	/* Before the table of file operations, whose being there says that both are. */
	ds->stock_riop = stock;
}

static struct dentry *df_lookup(struct inode *dir, struct dentry *dentry, unsigned int flags)
{
	struct df_sb *ds = df_of_diop(dir);
	struct df_inode *di = df_inode_get(ds, dir);
	u64 before = di ? df_names_epoch(di, true) : 0;
	struct dentry *found, *result;
	struct inode *inode;

	found = ds->stock_diop->lookup(dir, dentry, flags);
	if (IS_ERR(found))
		return found;
	result = found ?: dentry;
	inode = d_inode(result);
	if (inode)
		df_adopt(ds, inode);
	if (di)
		df_names_stamp(di, result, before);
	return found;
}

/* A file that was opened as it came into being has the stock driver's operations still. */
static void df_opened(struct df_sb *ds, struct inode *inode, struct file *file)
{
	struct df_inode *di;

	if (!inode)
		return;
	df_adopt(ds, inode);
	if (!(file->f_mode & FMODE_OPENED) || !S_ISREG(inode->i_mode))
		return;
	if (file->f_op == ds->stock_fop)
		file->f_op = &ds->fop;
	di = df_inode_get(ds, inode);
	if (di)
		df_file_track(di, file);
}

static int df_atomic_open(struct inode *dir, struct dentry *dentry, struct file *file,
			  unsigned int flags, umode_t mode)
{
	struct df_sb *ds = df_of_diop(dir);
	struct df_inode *di = df_inode_get(ds, dir);
	u64 before = di ? df_names_epoch(di, true) : 0;
	struct dentry *result;
	int ret;

	/*
	 * What comes into being is the stock driver's until df_opened(). Who walks to the name
	 * from here on asks the server for it, under the directory's lock, which is held here.
	 */
	WRITE_ONCE(dentry->d_time, 0);
	ret = ds->stock_diop->atomic_open(dir, dentry, file, flags, mode);
	if (ret)
		return ret;
	/* Where it was not opened after all, the file may have no name yet. */
	result = file->f_path.dentry ?: dentry;
	df_opened(ds, d_inode(result), file);
	if (di)
		df_names_stamp(di, result, before);
	return 0;
}

static int df_tmpfile(df_idmap *idmap, struct inode *dir, struct file *file, umode_t mode)
{
	struct df_sb *ds = df_of_diop(dir);
	int ret = ds->stock_diop->tmpfile(idmap, dir, file, mode);

	if (!ret)
		df_opened(ds, file_inode(file), file);
	return ret;
}

void df_make_diop(struct df_sb *ds, const struct inode_operations *stock)
{
	ds->diop = *stock;
	ds->diop.lookup = df_lookup;
	ds->diop.atomic_open = df_atomic_open;
	if (stock->tmpfile)
		ds->diop.tmpfile = df_tmpfile;
	ds->diop.getattr = df_dir_getattr;
	ds->diop.permission = df_dir_permission;
	/* Pairs with the acquire in df_adopt(): the table is whole. */
	smp_store_release(&ds->stock_diop, stock);
}
